"""What the report costs on a flow that does nothing: with its meters, and with them taken out."""

from __future__ import annotations

import asyncio
import time

from flow_overhead import first, second, third
from harness import Figures, Outcome, Row, judged, main, measure, need, paired

ITEMS = 50_000
PAIRS = 40


def once(look: bool) -> float:
    """CPU seconds of a run; ``look``: ask for the report four times a second, as a progress bar does."""
    import penstock as ps

    async def work() -> None:
        job = ps.Flow(range(ITEMS)).map(first).map(second).map(third).to(lambda _: None)
        async with job.start(progress=False) as run:
            loop = asyncio.get_running_loop()

            def ask() -> None:
                str(run.report())
                loop.call_later(0.25, ask)

            if look:
                ask()
            assert (await run.finish()).delivered == ITEMS

    began = time.process_time()
    asyncio.run(work())
    return time.process_time() - began


def report() -> Figures:
    """With meters, and with meters that count nothing."""
    from penstock.flow import meter

    def nothing(*_: object, **__: object) -> None:
        pass

    counted = [(meter.SegmentMeter, name) for name in ("passed", "stopped", "add_samples", "set_state")]
    counted.append((meter.StageMeter, "add_sample"))

    def bare() -> float:
        kept = [getattr(owner, name) for owner, name in counted]
        for owner, name in counted:
            setattr(owner, name, nothing)
        try:
            return once(look=False)
        finally:
            for (owner, name), method in zip(counted, kept, strict=True):
                setattr(owner, name, method)

    once(look=True)
    return paired(lambda: once(look=True), bare, PAIRS)


def run() -> Outcome:
    found = need(measure(__file__, "report"), "the report")
    claim = f"{ITEMS:,} items through three no-op async stages, the report asked for four times a second"
    row = Row(claim, f"{found['some']:.3f} s of CPU", "without meters", f"{found['others']:.3f} s of CPU")
    remark = f"The median of {PAIRS} pairs, and between which bounds it lies 19 times of 20."
    return Outcome([judged(row, found, 0.05)], remarks=[remark])


if __name__ == "__main__":
    main(run, report)
