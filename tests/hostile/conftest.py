"""What spoils inputs lies beside the campaign that does so for hours; toys are those of the packages' tests."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "packaging")]
