"""How benchmarks measure: devices, timing, cases, peers on a CPU."""
