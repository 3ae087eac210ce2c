"""The GPU run: one command that tests and measures everything on a machine with a GPU, nine minutes a call.

`python -m benchmarks.gpu` (`make gpu`) runs from the checkout without an installation. Every case runs in a worker
process with a time limit. A case that fails or hangs becomes a row that says so, and a worker that died is started
again.

    __main__      arguments, the folder, the exit code
    run           the sections in order, within the budget
    plan          the cases, the most important first; and those that --dry-run launches
    kernel_cases  the checks that need torch and triton only
    correctness   ours against float64 at real sizes
    features      what is timed beside plain attention and MLPs, and the other implementations of it
    cache_rivals  the other implementations of one token from a cache
    sweep         launch configurations beside the one in the table
    suite         the test suite in processes of its own; shards cuts it, recorder notes each outcome
    sanitizer     a small selection under compute-sanitizer, if it is installed
    state         what earlier calls have finished
    verdict       what a run may claim: exit code, first line, proofs
    rehearsal     --dry-run: everything launched on a pretended GPU
    cases         what a worker process does for a case; pool compares several peers in one
    compilations  how many kernels were compiled, and for how long
    environment   device, driver, versions, commit; and nothing else about the machine
    report        report.md and its plots from results.json

What `fastattn prove` needs, too, is in fastattn/measuring: kinds (calls of every family as data), checking and
tolerance (against float64), pool and worker (the two sides of a process), paths.
"""
