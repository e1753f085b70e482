"""Texts in parts, shown on Babel: what lines and sentences are worth on both tasks.

    python -m benchmarks.parts [--seeds 30,31,32] [--size small] [--work DIR] [--out FILE.md]

As `benchmarks.babel`, with stage 2 from the sum each time. Stage 1's documents have several
sentences and no newline, so stage 1 with lines is stage 1 with whole texts; the first task's texts
are single sentences, the second's pairs of lines. For the second, stage 2 also takes 3,000 steps in
which every other document is a pair of stage 1's sentences, with whole texts and with lines.
"""

import sys
from collections.abc import Sequence

from benchmarks.babel import Claim, Proof, Variant, command, gain_of
from mtllm_engine.evaluation.predictions import Predictions
from mtllm_engine.languages import ENGLISH

WHOLE, LINES, SENTENCES = "stack-whole", "stack-lines", "stack-sentences"
PAIRS, LINE_PAIRS = "stack-whole-pairs", "stack-lines-pairs"
SEEDS = (30, 31, 32)


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


def _paired(*settings: str) -> Variant:
    long = ["stage2.from=sum", "stage2.data.pairs=1.0", "stage2.optim.lr=3e-4", *settings]
    return Variant(settings=long, steps=3000, mixes=True, tasks=("nli",))


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
        PAIRS: _paired(),
        LINE_PAIRS: _paired("stage2.data.parts=lines"),
    },
    claims=claims,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m benchmarks.parts`."""
    out = "benchmarks/results/cpu/parts.md"
    return command("benchmarks.parts", PROOF.prove, PROOF.write, out, argv, seeds=SEEDS)


if __name__ == "__main__":
    sys.exit(main())
