// go-spiffe, which finds the socket in SPIFFE_ENDPOINT_SOCKET.
// usage: spiffe [RESTART ...], a command that ends the agent and returns when its successor has been started.
package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const deadline = 60 * time.Second

var (
	domain = spiffeid.RequireTrustDomainFromString("example.org")
	first  = spiffeid.RequireFromString("spiffe://example.org/client")
	second = spiffeid.RequireFromString("spiffe://example.org/second")
)

func main() {
	log.SetFlags(0)
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	client := must(workloadapi.New(ctx))
	defer client.Close()

	svids := must(client.FetchX509SVIDs(ctx))
	check(len(svids) == 2 && svids[0].ID == first && svids[1].ID == second, svids)
	check(svids[0].Hint == "internal" && svids[1].Hint == "", svids)
	passed("svids", fmt.Sprintf("%v, hint %s, and %v", svids[0].ID, svids[0].Hint, svids[1].ID))
	bundles := must(client.FetchX509Bundles(ctx))
	roots := must(bundles.GetX509BundleForTrustDomain(domain)).X509Authorities()
	passed("bundles", fmt.Sprintf("%d root of %v", len(roots), domain))

	_, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "a"})
	check(status.Code(err) == codes.Unimplemented, err)
	_, err = client.FetchWITSVIDs(ctx, "")
	check(status.Code(err) == codes.Unimplemented, err)
	passed("profiles", err)

	source := must(workloadapi.NewX509Source(ctx))
	defer source.Close()
	before := must(source.GetX509SVID()).Certificates[0].SerialNumber
	passed("handshake", handshake(ctx, source))
	check(source.WaitUntilUpdated(ctx) == nil, "no update")
	for must(source.GetX509SVID()).Certificates[0].SerialNumber.Cmp(before) == 0 {
		check(source.WaitUntilUpdated(ctx) == nil, "no update")
	}
	passed("renewed", handshake(ctx, source))
	if len(os.Args) > 1 {
		surviveRestart(ctx, client)
	}
}

// handshake is mutual TLS between two ends of the same identity.
func handshake(ctx context.Context, source *workloadapi.X509Source) string {
	authorize := tlsconfig.AuthorizeID(first)
	listener := must(tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, authorize)))
	defer listener.Close()
	served := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			err = conn.(*tls.Conn).HandshakeContext(ctx)
		}
		served <- err
	}()
	dialer := tls.Dialer{NetDialer: &net.Dialer{}, Config: tlsconfig.MTLSClientConfig(source, source, authorize)}
	conn := must(dialer.DialContext(ctx, "tcp", listener.Addr().String()))
	defer conn.Close()
	err := <-served
	check(err == nil, err)
	state := conn.(*tls.Conn).ConnectionState()
	return fmt.Sprintf("%v with serial %x", state.PeerCertificates[0].URIs[0], state.PeerCertificates[0].SerialNumber)
}

// watcher remembers what a watch is told.
type watcher struct {
	updates chan *workloadapi.X509Context
	errors  chan error
}

func (w watcher) OnX509ContextUpdate(update *workloadapi.X509Context) { w.updates <- update }
func (w watcher) OnX509ContextWatchError(err error)                   { w.errors <- err }

func surviveRestart(ctx context.Context, client *workloadapi.Client) {
	w := watcher{make(chan *workloadapi.X509Context, 64), make(chan error, 64)}
	go func() { _ = client.WatchX509Context(ctx, w) }()
	before := <-w.updates
	restart := exec.CommandContext(ctx, os.Args[1], os.Args[2:]...)
	check(restart.Run() == nil, restart)
	err := <-w.errors
	check(status.Code(err) == codes.Unavailable, err)
	// What came before the restart does not show that the watch was resumed.
	for len(w.updates) > 0 {
		before = <-w.updates
	}
	for {
		select {
		case after := <-w.updates:
			if after.DefaultSVID().Certificates[0].SerialNumber.Cmp(before.DefaultSVID().Certificates[0].SerialNumber) != 0 {
				passed("resumed", err)
				return
			}
		case <-ctx.Done():
			check(false, "no update after the restart")
		}
	}
}

func passed(name string, seen any) { fmt.Printf("ok %s: %v\n", name, seen) }

func check(holds bool, seen any) {
	if !holds {
		log.Fatalf("not as expected: %v", seen)
	}
}

func must[T any](value T, err error) T {
	check(err == nil, err)
	return value
}
