import io.spiffe.spiffeid.SpiffeId;
import io.spiffe.spiffeid.TrustDomain;
import io.spiffe.svid.x509svid.X509Svid;
import io.spiffe.workloadapi.DefaultWorkloadApiClient;
import io.spiffe.workloadapi.DefaultX509Source;
import io.spiffe.workloadapi.Watcher;
import io.spiffe.workloadapi.WorkloadApiClient;
import io.spiffe.workloadapi.X509Context;
import java.util.List;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;

/**
 * java-spiffe, which finds the socket in SPIFFE_ENDPOINT_SOCKET. Arguments: a command that ends the agent and returns when
 * its successor has been started.
 */
public final class WorkloadApi {
  private static final int DEADLINE_SECONDS = 60;
  private static final TrustDomain DOMAIN = TrustDomain.parse("example.org");

  public static void main(String[] restart) throws Exception {
    try (WorkloadApiClient client = DefaultWorkloadApiClient.newClient()) {
      List<X509Svid> svids = client.fetchX509Context().getX509Svids();
      List<SpiffeId> ids = svids.stream().map(X509Svid::getSpiffeId).toList();
      check(ids.equals(List.of(SpiffeId.parse("spiffe://example.org/client"), SpiffeId.parse("spiffe://example.org/second"))), ids);
      check(svids.get(0).getHint().equals("internal"), svids.get(0).getHint());
      passed("svids", ids);

      var roots = client.fetchX509Bundles().getBundleForTrustDomain(DOMAIN).getX509Authorities();
      for (var root : roots) {
        svids.get(0).getLeaf().verify(root.getPublicKey());
      }
      passed("bundles", roots.size() + " root of " + DOMAIN);

      try {
        client.fetchJwtSvid("a");
        check(false, "a JWT-SVID");
      } catch (Exception error) {
        check(String.valueOf(error.getCause()).contains("UNIMPLEMENTED"), error.getCause());
        passed("profiles", error.getCause());
      }

      var updates = new LinkedBlockingQueue<X509Context>();
      client.watchX509Context(new Watcher<>() {
        @Override public void onUpdate(X509Context update) {
          updates.add(update);
        }

        @Override public void onError(Throwable error) {
          System.err.println("the watch is told: " + error);
        }
      });
      passed("renewed", "serial " + another(updates, serial(updates.poll(DEADLINE_SECONDS, TimeUnit.SECONDS))));
      if (restart.length > 0) {
        String before = null;
        for (var update = updates.poll(); update != null; update = updates.poll()) {
          before = serial(update);
        }
        check(new ProcessBuilder(restart).inheritIO().start().waitFor() == 0, "restart");
        updates.clear();
        passed("resumed", "serial " + another(updates, before));
      }
    }
    try (var source = DefaultX509Source.newSource()) {
      check(source.getBundleForTrustDomain(DOMAIN) != null, "no bundle");
      passed("source", source.getX509Svid().getSpiffeId());
    }
    System.exit(0);
  }

  /** The next serial number that is not `before`. */
  private static String another(LinkedBlockingQueue<X509Context> updates, String before) throws InterruptedException {
    while (true) {
      X509Context update = updates.poll(DEADLINE_SECONDS, TimeUnit.SECONDS);
      check(update != null, "no update");
      if (!serial(update).equals(before)) {
        return serial(update);
      }
    }
  }

  private static String serial(X509Context context) {
    return context.getDefaultSvid().getLeaf().getSerialNumber().toString(16);
  }

  private static void passed(String check, Object seen) {
    System.out.println("ok " + check + ": " + seen);
  }

  private static void check(boolean holds, Object seen) {
    if (!holds) {
      throw new AssertionError("not as expected: " + seen);
    }
  }
}
