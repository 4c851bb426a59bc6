package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"
	certificates "k8s.io/api/certificates/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	typed "k8s.io/client-go/kubernetes/typed/certificates/v1"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	signer   = "kubernetes.io/kube-apiserver-client"
	approved = `{"status":{"conditions":[{"type":"Approved","status":"True","reason":"Floor","message":"floor"}]}}`
)

// floor is the least that one certificate over the CSR API costs: a key, create, approve, a watch by name, delete, by a bare Go client
// that proves nobody and decides nothing. It prints the median and the 90th and 99th percentile in microseconds.
func floor() *cobra.Command {
	var kubeconfig string
	var count int
	var pause time.Duration
	command := &cobra.Command{
		Use:  "csr-floor",
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
			if err != nil {
				return err
			}
			config.QPS, config.Burst = 1e6, 1e6
			config.ContentType = "application/vnd.kubernetes.protobuf"
			client, err := kubernetes.NewForConfig(config)
			if err != nil {
				return err
			}
			requests := client.CertificatesV1().CertificateSigningRequests()
			var took []time.Duration
			for range count {
				began := time.Now()
				if err := certificate(command.Context(), requests); err != nil {
					return err
				}
				took = append(took, time.Since(began))
				time.Sleep(pause)
			}
			slices.Sort(took)
			at := func(percent int) int64 { return took[(len(took)-1)*percent/100].Microseconds() }
			fmt.Println(at(50), at(90), at(99))
			return nil
		},
	}
	command.Flags().StringVar(&kubeconfig, "kubeconfig", "", "who asks; it must be allowed to approve")
	command.Flags().IntVar(&count, "count", 200, "certificates, one after another")
	command.Flags().DurationVar(&pause, "pause", 50*time.Millisecond, "between two of them")
	return command
}

func certificate(ctx context.Context, requests typed.CertificateSigningRequestInterface) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	wanted := &x509.CertificateRequest{Subject: pkix.Name{CommonName: "floor"}, DNSNames: []string{"floor.test.svc"}}
	der, err := x509.CreateCertificateRequest(rand.Reader, wanted, key)
	if err != nil {
		return err
	}
	lifetime := int32(3600)
	made, err := requests.Create(ctx, &certificates.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "floor-"},
		Spec: certificates.CertificateSigningRequestSpec{
			Request:           pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			SignerName:        signer,
			ExpirationSeconds: &lifetime,
			Usages:            []certificates.KeyUsage{certificates.UsageDigitalSignature, certificates.UsageClientAuth},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	if _, err = requests.Patch(ctx, made.Name, types.MergePatchType, []byte(approved), metav1.PatchOptions{}, "approval"); err != nil {
		return err
	}
	watch, err := requests.Watch(ctx, metav1.SingleObject(made.ObjectMeta))
	if err != nil {
		return err
	}
	defer watch.Stop()
	for event := range watch.ResultChan() {
		request, ok := event.Object.(*certificates.CertificateSigningRequest)
		if !ok {
			return fmt.Errorf("the watch of %s said %v", made.Name, event.Object)
		}
		if len(request.Status.Certificate) > 0 {
			return requests.Delete(ctx, made.Name, metav1.DeleteOptions{})
		}
	}
	return errors.New("the watch of " + made.Name + " ended before the certificate came")
}
