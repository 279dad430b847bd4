"""Benchmarks: claims of papers with verdicts (`ledger`, `claims`, `protocols`), and step times (`speed`).

python -m benchmarks list
python -m benchmarks run warm_start
python -m benchmarks report
"""
