"""Where latency numbers come from, and what is learned of them while serving.

* ``format``: the profile file; ``catalogue``: the profiles in this package, and loading.
* ``fit``, ``tables``: from observed steps to a formula or tables, with cross-validated error.
* ``measure``: observed steps from a live engine.
* ``correct``: a factor per backend and regime, learned online. ``lengths``: how long answers become.

An observation goes in, an immutable snapshot with its version and error comes out; a later one replaces it.
The learning parts read no clock and do no I/O. Only ``tiergate_engine`` is imported from this project.
"""

from profiles.assumed import prior as prior
from profiles.catalogue import load as load
from profiles.catalogue import shipped as shipped
from profiles.format import Limits as Limits
from profiles.format import Profile as Profile
from profiles.format import ProfileError as ProfileError
