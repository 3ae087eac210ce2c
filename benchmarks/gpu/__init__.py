"""The GPU run: one command that proves and measures everything on a machine with a GPU, nine minutes a call.

`python -m benchmarks.gpu` (`make gpu`) from the checkout, nothing installed. What fails or hangs is a row that
says so: every case runs in a worker process with a time limit, and the worker is started again after a loss.

    __main__      arguments, the folder, the exit code
    run           the sections in order, within the budget
    plan          which cases, the most important first; and what of them --dry-run launches
    kinds         calls of every family and kind as data: tensors and a function, whose definition is a backend
    kernel_cases  the proofs that need torch and triton only
    correctness   ours against float64
    features      what is timed beside plain attention and MLPs, and who else can compute it
    sweep         launch configurations beside the one in the table
    suite         the test suite in processes of its own; shards cuts it, recorder notes each outcome
    state         what earlier calls have finished
    verdict       what a run may claim: exit code, first line, proofs
    rehearsal     --dry-run: everything launched on a pretended GPU
    pool, worker  the parent's and the worker's side of a process; cases is what a worker does
    compilations  how many kernels were compiled, and for how long
    paths         where the checkout is, and texts without any trace of that
    environment   device, driver, versions, commit; and nothing else about the machine
    report        report.md and its plots from results.json
"""
