"""Secure aggregation: the server learns the sum of the sites' updates, and no update.

The protocol of Bonawitz et al. (CCS 2017, doi:10.1145/3133956.3133982), double masking with secret shares for those
that drop out, in its variant with signatures, against a server that doesn't keep to it. In a round:

1. *keys*: each site makes two key pairs for this round alone, and signs the public ones with its node key.
2. *shares*: told everybody's, it splits its masking key and a seed of its own among all (Shamir), each share
   encrypted for its receiver; the server passes them on.
3. *masked*: it adds to its update the stream of its seed and, for each other site, a stream that both can make: one
   adds it, the other takes it away.
4. *confirm*: it signs who handed in a masked update.
5. *unmask*: shown that enough sites signed the same, it gives its shares of the seeds of those who handed in, and of
   the masking keys of those who didn't; never both of one site, and once.

From these the server takes away what doesn't cancel by itself, and is left with the sum.
"""
