"""Benchmarks: cases that run each in a fresh process, and the results that docs/benchmarks.md shows.

Your own bundle on your own machine:

    flashcocos bench model.zip --quick           a table within two minutes
    flashcocos bench model.zip --profile         the time of each stage, and of each kind of operator in it

The project's results in three commands:

    python -m flashcocos.benchmarks model -o bench_model     a random full-size network, its bundle and its naive graph
    python -m flashcocos.benchmarks run --model bench_model  all cases
    python -m flashcocos.benchmarks report                   docs/benchmarks.md, the README's table and the plots

Everything that only a GPU can show, in ten minutes (docs/gpu.md):

    python -m flashcocos.benchmarks gpu -o FOLDER

`list` shows the cases; `run --group warp --only 'warp/numba-*'` chooses.
`--bundle int8=path/to/bundle` adds a bundle of the same model to the ablation. A row is written to benchmarks/results
as soon as it is measured, and the same command continues a run that was stopped. A file is refused where revision,
versions, machine, threads or model differ (`--fresh` begins it anew). A case whose result is outside its bound has a
row without a time, and so has a case that runs out of memory.

cases, registry, gpu: what can be measured, and how it is selected. runner, worker: processes and files. report, tables,
plots: what is shown. provenance: machine and versions. speed/: what is timed. quality/: what is scored, behind
`flashcocos evaluate`.
"""
