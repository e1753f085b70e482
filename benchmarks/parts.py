"""Texts in parts, shown on Babel: what lines and sentences are worth on both tasks.

    python -m benchmarks.parts [--seeds 40,41,42] [--size small] [--work DIR] [--out FILE.md]

As `benchmarks.babel`, with stage 2 from the sum each time. Stage 1's documents have several
sentences and no newline, so stage 1 with lines is stage 1 with whole texts; the first task's texts
are single sentences, the second's pairs of lines. For the second, stage 2 with lines also takes
3,000 steps: on the task's texts alone, and with every other document a pair of stage 1's sentences.
"""

import sys
from collections.abc import Sequence

from benchmarks.babel import Claim, Proof, Variant, command, gain_of
from mtllm_engine.evaluation.predictions import Predictions
from mtllm_engine.languages import ENGLISH

WHOLE, LINES, SENTENCES = "stack-whole", "stack-lines", "stack-sentences"
LONG, PAIRS = "stack-lines-long", "stack-lines-pairs"
SEEDS = (40, 41, 42)


def claims(task: str, predictions: Sequence[Predictions]) -> list[Claim]:
    """What is aimed at with parts in a task."""
    stacks = [stack for stack, variant in PROOF.variants.items() if task in variant.tasks]
    gains = {stack: gain_of(predictions, stack, WHOLE) for stack in stacks if stack != WHOLE}
    found = [
        Claim(text=f"{stack} - {WHOLE}", score=gain, least=0.0) for stack, gain in gains.items()
    ]
    if task == "nli":
        best = max(gains, key=lambda stack: gains[stack].value)
        abroad = gain_of(predictions, best, "translate_test")
        english = gain_of(predictions, best, "llm", language=ENGLISH)
        found.append(Claim(text=f"{best} - translate_test", score=abroad, least=0.0))
        found.append(Claim(text=f"{best} - llm, in English", score=english, least=-0.03))
    return found


def _long(*settings: str, mixes: bool = False) -> Variant:
    from_sum = ["stage2.from=sum", "stage2.data.parts=lines", "stage2.optim.lr=3e-4"]
    return Variant(settings=[*from_sum, *settings], steps=3000, mixes=mixes, tasks=("nli",))


PROOF = Proof(
    title="Parts",
    variants={
        WHOLE: Variant(settings=["stage2.from=sum"], sum="sum-whole", is_first=True),
        LINES: Variant(settings=["stage2.from=sum", "stage2.data.parts=lines"], sum="sum-lines"),
        SENTENCES: Variant(
            settings=[
                "stage2.from=sum",
                "stage1.data.parts=sentences",
                "stage2.data.parts=sentences",
            ],
            sum="sum-sentences",
        ),
        LONG: _long(),
        PAIRS: _long("stage2.data.pairs=1.0", mixes=True),
    },
    claims=claims,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.parts`."""
    out = "benchmarks/results/cpu/parts.md"
    return command("benchmarks.parts", PROOF.prove, PROOF.write, out, argv, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
