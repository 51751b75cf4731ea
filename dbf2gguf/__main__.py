"""Run the command line: python -m dbf2gguf."""

import sys

from dbf2gguf.cli import main

sys.exit(main())
