"""What Lightning needs beside a method: sharded weights, checkpoints, callbacks."""
