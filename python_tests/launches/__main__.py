import sys

from python_tests.launches.table import main

sys.exit(main())
