"""Calls that a hostile caller makes, drawn from seeds, and what must come of each.

oracle      what a result must be
tensors     problems, and the many kinds of tensors that hold one
calls       calls that are in order, and must give the right numbers
refusals    calls that are not, and must be refused
driver      many seeds in child processes; `python -m fuzz --help`
"""

from __future__ import annotations

import warnings
from collections import Counter
from random import Random

from fuzz import calls, refusals
from fuzz.oracle import Wrong
from nflows_kconv.backends import native

# A kind of call and its share of the seeds.
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
    """Makes the calls of this seed and returns how many there were of each kind.

    Raises:
        Wrong: If one of them went wrong.
    """
    random = Random(seed)
    (kind,) = random.choices(list(KINDS), weights=KINDS.values())
    name = f"{kind.__module__.removeprefix('fuzz.')}.{kind.__name__}"
    if native.available:
        native.select_instruction_set(random.choice(native.instruction_sets()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about sparse, nested and quantised tensors
        try:
            return Counter({name: kind(random)})
        except Exception as error:
            raise Wrong(f"seed {seed}, {name}: {type(error).__name__}: {error}") from error
