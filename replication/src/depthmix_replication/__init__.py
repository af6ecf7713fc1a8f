"""The paper's tables and figures as experiments: data, runs, results, drawings."""
