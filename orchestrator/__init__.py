"""The experiment orchestrator: from images on disk to a table of distilled students.

sweep, train, teacher, evaluate, export, report    command lines
command                                            what the command lines share: errors, plans, --set
reporting/                                         reports and tables of sweeps
on_ray, tracking, cache                            the only doors to Ray and Optuna, MLflow, Arrow
methods/                                           one file per method
fit, checkpoint, distributed                       the training loop and what it needs, plain torch
datasets/, evaluation/                             images and identities in, numbers out
published/                                         printed numbers with their source, one file per paper
method, find                                       the contract and the finder

Importing the package loads nothing.
"""
