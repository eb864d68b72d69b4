"""``python -m stunet_plugin`` is ``stunet``."""

import sys

from stunet_plugin.cli import main

sys.exit(main())
