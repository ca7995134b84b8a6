"""What a server does with the updates of sites: pure functions of arrays by name, without a network library."""
