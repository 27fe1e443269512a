"""The experiment orchestrator: from images on disk to a table of distilled students.

Each line imports only what stands below it:

sweep, train, teacher, evaluate, export, report, doctor    command lines; command: their words
reporting/                                         reports and tables of sweeps; needs no Ray
on_ray/                                            the only door to Ray
launch/                                            what a sweep is, what it needs, one trial, who runs it; no Ray
tracking, figures, progress                        the only door to MLflow; all pictures; the display
methods/                                           one file per method that can be named
families/                                          what methods of one task share
fit, cache, checkpoint                             the training loop; the only door to Arrow; stored networks
datasets/, evaluation/                             images and identities in, numbers out
find, published/, distributed                      names to files; printed numbers with their source; ranks
method, needs, pictures, recipe                    the contract: what a method is, needs, shows and can be set to
models, losses, search_spaces                      packages of their own: networks, loss terms, questions

Importing the package loads nothing.
"""
