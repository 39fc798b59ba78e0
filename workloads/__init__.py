"""What is offered to a fleet, live or simulated; everything is seeded.

* ``formats``, ``traces``: real traces in their native formats; slices and scaling.
* ``arrivals``: when requests come.
* ``mix``, ``plan``: which tier each request asks for, and which of them are measured.
"""
