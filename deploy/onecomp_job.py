"""Any onecomp command line as a Ray job, from a checkout that need not be installed.

    ray job submit --address URL --working-dir . -- python deploy/onecomp_job.py quantize ...

Ray puts the working directory on the path of the job's driver and workers; this script does so for
itself, too, and runs `actors.job`, which says what is special about a job. ``onecomp submit`` is
the same in one command, follows the job and passes its exit status on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from actors.job import run_job

if __name__ == "__main__":
    run_job(sys.argv[1:])
