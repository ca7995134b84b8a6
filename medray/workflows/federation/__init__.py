"""Hospitals that train one model together: the site's work, the server's rounds, and a simulation of both."""
