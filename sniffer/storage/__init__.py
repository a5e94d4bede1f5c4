"""The run folder: written so that nothing is lost, and read only where it is what it says.

lock, ownership, untrusted, bounds, durable     whose folder it is, and files that are whole or not there
schema, sort, finite, digest, writer            rows as a part: one Parquet file per (layer, kind)
manifest, examples, documents                   what counts, and which texts it is from
store                                           a run being written: rows, then parts, then the manifest
on_disk, same_run, integrity                    what an earlier session left, and whether it can go on
urls, remote, parquet                           a folder at a URL, read as one of this machine is
target, mirror, following                       a run's copy there, and a thread that keeps it up to date
"""
