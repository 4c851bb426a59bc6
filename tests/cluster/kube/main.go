// Command kube is one role of a Kubernetes cluster, named by its first argument: etcd, kube-apiserver,
// kube-controller-manager, kube-scheduler, kubelet or kubectl; or csr-floor, which a benchmark compares with. One binary,
// because linking takes longer than all else.
package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

var roles = map[string]func() *cobra.Command{
	"csr-floor":               floor,
	"etcd":                    etcd,
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": controllers.NewControllerManagerCommand,
	"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
	"kubelet":                 func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) },
	"kubectl":                 kubectl.NewDefaultKubectlCommand,
}

func main() {
	var role func() *cobra.Command
	if len(os.Args) > 1 {
		role = roles[os.Args[1]]
	}
	if role == nil {
		fmt.Fprintln(os.Stderr, "usage: kube csr-floor|etcd|kube-apiserver|kube-controller-manager|kube-scheduler|kubelet|kubectl ...")
		os.Exit(64)
	}
	os.Args = os.Args[1:]
	os.Exit(cli.Run(role()))
}

// etcd keeps its data in a folder and serves clients on one address, until it is told to stop. It does not wait for the
// disk: what a power cut would lose, no test looks for.
func etcd() *cobra.Command {
	return &cobra.Command{
		Use:  "etcd DIR CLIENT_URL PEER_URL",
		Args: cobra.ExactArgs(3),
		RunE: func(_ *cobra.Command, args []string) error {
			config := embed.NewConfig()
			config.Dir, config.LogLevel, config.UnsafeNoFsync = args[0], "warn", true
			client, err := url.Parse(args[1])
			if err != nil {
				return err
			}
			peer, err := url.Parse(args[2])
			if err != nil {
				return err
			}
			config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
			config.ListenPeerUrls, config.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
			config.InitialCluster = config.InitialClusterFromName(config.Name)
			server, err := embed.StartEtcd(config)
			if err != nil {
				return err
			}
			defer server.Close()
			stop := make(chan os.Signal, 1)
			signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
			select {
			case <-stop:
				return nil
			case err := <-server.Err():
				return err
			}
		},
	}
}
