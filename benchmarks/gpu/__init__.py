"""The GPU run: one command that proves and measures everything on a machine with a GPU, within nine minutes.

`python -m benchmarks.gpu` (`make gpu`) from the checkout, nothing installed. What fails or hangs is a row that
says so: every case runs in a worker process with a time limit, and the worker is started again after a loss.

    __main__     the sections in order, the deadline, the folder
    plan         which cases, the most important first; their tiny versions for --dry-run
    pool         the parent's side of a worker: ask, wait, restart
    worker       the worker's side: read a case, run it, answer
    cases        what is done for a case: peers, correctness, ceilings, sweep
    suite        the test suite, and recorder, the pytest plugin that notes each outcome as it comes
    paths        where the checkout is, and texts without any trace of that
    environment  device, driver, versions, commit; and nothing else about the machine
    report       report.md and its plots from results.json
"""
