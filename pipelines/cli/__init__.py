"""The command line, `curlora …`."""
