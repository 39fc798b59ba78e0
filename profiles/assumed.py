"""What to assume of a backend that nobody has measured."""

from __future__ import annotations

from profiles.format import (
    Coefficients,
    Limits,
    Profile,
    ProfileFile,
    Provenance,
    Regime,
    Regimes,
    Source,
    build,
)

_ASSUMED = Coefficients(
    c0_s=0.005,
    weights_s=0.025,
    per_token_s=1.0e-4,
    sharpness=2.0,
    per_seq_s=5.0e-5,
    per_kv_s=2.0e-7,
    mixed_kv_s=2.0e-7,
    per_context_s=5.0e-7,
    per_attention_s=3.0e-9,
)
_ASSUMED_LIMITS = Limits(kv_tokens=65_536, max_running_seqs=64, max_batched_tokens=2048)


def prior(limits: Limits | None = None) -> Profile:
    """Conservative step times for a backend without a profile: about an 8B model on a slow data-centre GPU.

    `limits` are what a probe found; what it did not find is filled with cautious values, except the model length
    (guessing that would turn good requests away). Until a `Corrector` has seen enough steps, a backend that rests
    on this is uncalibrated.
    """
    found = {} if limits is None else limits.model_dump(exclude_none=True)
    file = ProfileFile(
        format=1,
        name="prior",
        model="unknown",
        hardware="unknown",
        engine="unknown",
        provenance=Provenance(
            origin="assumed", licence="Apache-2.0", date="none", command="none", conditions="nothing was measured"
        ),
        limits=_ASSUMED_LIMITS.model_copy(update=found),
        regimes=Regimes(decode=Regime(source=Source.FORMULA), mixed=Regime(source=Source.FORMULA)),
        coefficients=_ASSUMED,
    )
    return Profile(file, build(file, "prior"))
