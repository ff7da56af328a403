"""Frozen weights live in host memory or on disk, and visit the device when their block computes.

=========== ============================================================================================================
`layout`    the weights of a block in one piece of memory
`homes`     where they live: host memory, or the checkpoint's own files
`slots`     two buffers on the device: one is filled while the other is read
`saved`     what backward needs of a block that has left the device
`calls`     what is hung on modules
`block`     one block, and which of its weights are away from the device
`streaming` `htsr.stream_frozen`
=========== ============================================================================================================
"""
