"""Parts of training that are independent of the method: sharding, checkpoints, callbacks, schedules."""
