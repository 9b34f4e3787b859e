"""New weights into the servers, through a disk, in buckets or in shared memory."""
