# SPDX-License-Identifier: BSD-3-Clause
"""A vhost-user-blk front end for tests: what QEMU and a guest's driver do, step by step, and what a hostile one might.

`protocol` speaks to the back end and has the guest's memory, `virtqueue` is a split ring in it, `disk` makes requests
through rings as `nbd.NBD` does.

Of two stores of this process, x86 shows the first one first to all processors, and Python moves none of its own: that
orders a ring's entries before its index. Only a load after a store needs a fence; see `Virtqueue`.
"""
