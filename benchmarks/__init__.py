"""Benchmarks: cases that run each in a fresh process, and the results that the README shows.

One's own bundle, on one's own machine:

    flashcocos bench model.zip --quick           a table within two minutes
    flashcocos bench model.zip --profile         the time of each stage, and of each kind of operator in it

The project's results, made again with three commands:

    python -m flashcocos.benchmarks model -o bench_model     a random full-size network, its bundle and its naive graph
    python -m flashcocos.benchmarks run --model bench_model  the published cases: about 25 minutes on two cores
    python -m flashcocos.benchmarks report                   README and plots from the results files

`list` shows the cases, `--all` also those that are not published; `run --group warp --only 'warp/numba-*'` chooses.
`--bundle int8=path/to/bundle` adds a bundle of the same model to the ablation. A row is kept in benchmarks/results as
soon as it is done: a run that was stopped goes on, and a file is refused where revision, versions, machine, threads or
model are others (`--fresh` begins it anew). What is compared and is outside its bound is a row without a time; so is
what memory does not suffice for. `--device cuda` runs the cases that a GPU has; none of them has run on one yet.

registry: types, selection. catalog: the cases. runner, worker: processes and files. warp, translation, training,
machine: what runs. naive: the published form that all is compared with. tables, plots: what is shown. bundle,
profiling: behind `flashcocos bench`. corr_warp_gpu: a script of its own.
"""
