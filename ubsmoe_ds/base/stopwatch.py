"""Wall-clock seconds by stage: one lap after the other, so that no moment is counted twice or left out."""

import time
from collections import defaultdict


class Stopwatch:
    """Adds the time since the previous lap to a named stage; `seconds` holds the sums."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.start()

    def start(self) -> None:
        """Begin a lap; the time since the previous one counts for no stage."""
        self._since = time.perf_counter()

    def lap(self, stage: str) -> float:
        """End a lap and begin the next; return its seconds."""
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self.seconds[stage] += elapsed
        return elapsed

    def reset(self) -> None:
        """Forget all stages, and begin a lap."""
        self.seconds.clear()
        self.start()
