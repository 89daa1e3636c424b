"""What goes to the device and comes back: bundles, their proof, devices over SSH."""
