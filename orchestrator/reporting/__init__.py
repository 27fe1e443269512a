"""Reports and tables of sweeps, from plans, studies and MLflow runs; nothing needs a cluster.

content        tables, pictures and sections, and how they become HTML and Markdown
scores         how the metrics of a sweep's methods are named and written
provenance     where numbers come from: recipes, teachers, data, commands
trial_table    every trial, in the terminal and in the report; the best one
curves, rows   a sweep of tuned fields; a table of rows × seeds and what they cost
printed        published tables with ours beside them
summary        a sweep as a whole: its report and its summary run in MLflow
"""
