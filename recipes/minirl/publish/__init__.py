"""New weights into the servers, through a disk or in buckets."""
