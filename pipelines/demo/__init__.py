"""Model, text and tasks of `curlora demo`, made from the installed packages."""
