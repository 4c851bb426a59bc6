//go:build tools

// Package containerd pins the container runtime of the test node. Its commands are main packages, which cannot be linked
// into one binary, so they are built one by one by their paths.
package containerd

import (
	_ "github.com/containerd/containerd/v2/cmd/containerd"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"
	_ "github.com/containerd/containerd/v2/cmd/ctr"
)
