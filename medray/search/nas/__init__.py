"""Architecture search: super-networks and the strategies that search them. A new strategy is a file, and a line in
:mod:`medray.search.nas.strategies`."""
