"""The joint law on models small enough to write down, for every rule."""

from benchmarks.exactness_suite.scale import Scale
from pipeline.sampling.exactness import Check, TableModel, bound_check, law_error

BOUND = 1e-12


def enumeration_checks(scale: Scale) -> list[Check]:
    """Error of the law of all sequences, drafts of every kind and random numbers integrated out."""
    checks = []
    for vocabulary, length in scale.tables:
        model, proposal = (TableModel(seed, vocabulary, length) for seed in (2, 3))
        for rule in ("deterministic", "standard", "block"):
            if rule == "deterministic" and vocabulary**length > 30:
                continue  # one batch a draft; the larger tables add nothing to it
            error = law_error(model, length, rule, proposal)
            name = f"joint law, {rule} drafts of {length} tokens over {vocabulary}"
            checks.append(bound_check(name, error, BOUND, detail="largest error of a probability"))
        error = law_error(model, length, "standard", model)
        checks.append(
            bound_check(f"joint law, drafts from the target itself, {length} over {vocabulary}", error, BOUND)
        )
    return checks
