"""Exchange with other libraries; every module here needs its extra."""
