-- Run once by PostgreSQL's image, when its volume is empty. POSTGRES_DB is MLflow's database. Optuna has its own:
-- both keep the version of their tables in a table of the same name.
CREATE DATABASE optuna;
