import sys

from python_tests.cuda_on_cpu.launches.table import main

sys.exit(main())
