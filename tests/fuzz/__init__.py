"""Calls of a hostile caller, drawn from seeds, and their required outcomes.

oracle      what a result must be
tensors     problems, and many kinds of tensors that hold them
calls       valid calls, which must give the right numbers
refusals    invalid calls, which must be refused
driver      many seeds in child processes; `python -m fuzz --help`
"""

from __future__ import annotations

import warnings
from collections import Counter
from random import Random

from fuzz import calls, refusals
from fuzz.oracle import Wrong
from nflows_kconv.backends import native

# Kinds of calls and their shares of the seeds.
KINDS = {
    calls.functions: 50,
    calls.operators: 15,
    calls.layers: 7,
    calls.gradients: 3,
    refusals.operators: 10,
    refusals.functions: 10,
    refusals.sizes: 1,
}


def run(seed: int) -> Counter[str]:
    """Makes the calls of a seed and returns the number of each kind.

    Raises:
        Wrong: If one of them went wrong.
    """
    random = Random(seed)
    (kind,) = random.choices(list(KINDS), weights=KINDS.values())
    name = f"{kind.__module__.removeprefix('fuzz.')}.{kind.__name__}"
    if native.available:
        native.select_instruction_set(random.choice(native.instruction_sets()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about sparse, nested and quantised tensors
        try:
            return Counter({name: kind(random)})
        except Exception as error:
            raise Wrong(f"seed {seed}, {name}: {type(error).__name__}: {error}") from error
