"""`curlora compare`: several methods on one sequence of tasks."""
