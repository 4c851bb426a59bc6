//! The key usages that a workload certificate may carry, as the set a request asks for and a policy allows.

use std::fmt;

/// One key usage or extended key usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Usage {
    /// KeyUsage digitalSignature (RFC 5280 section 4.2.1.3).
    DigitalSignature,
    /// KeyUsage keyEncipherment; meaningful for RSA keys only.
    KeyEncipherment,
    /// ExtendedKeyUsage id-kp-serverAuth (RFC 5280 section 4.2.1.12).
    ServerAuth,
    /// ExtendedKeyUsage id-kp-clientAuth.
    ClientAuth,
}

impl Usage {
    /// Every usage, in the order in which they are printed.
    pub const ALL: [Self; 4] = [Self::DigitalSignature, Self::KeyEncipherment, Self::ServerAuth, Self::ClientAuth];

    /// The name that Kubernetes uses in `spec.usages`, also used in policies and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::DigitalSignature => "digital signature",
            Self::KeyEncipherment => "key encipherment",
            Self::ServerAuth => "server auth",
            Self::ClientAuth => "client auth",
        }
    }

    /// The usage of that name, as [`Usage::name`] gives it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|usage| usage.name() == name)
    }
}

/// A set of usages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Usages(u8);

impl Usages {
    /// What a request without usages asks for.
    pub const DEFAULT: Self =
        Self::empty().with(Usage::DigitalSignature).with(Usage::ServerAuth).with(Usage::ClientAuth);

    /// No usage.
    pub const fn empty() -> Self {
        Self(0)
    }

    /// This set and `usage`.
    pub const fn with(self, usage: Usage) -> Self {
        Self(self.0 | 1 << usage as u8)
    }

    /// Whether `usage` is in the set.
    pub const fn contains(self, usage: Usage) -> bool {
        self.0 & (1 << usage as u8) != 0
    }

    /// Whether the set is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The usages in this set that are not in `allowed`.
    pub const fn minus(self, allowed: Self) -> Self {
        Self(self.0 & !allowed.0)
    }

    /// The usages in the set, in the order of [`Usage::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Usage> {
        Usage::ALL.into_iter().filter(move |usage| self.contains(*usage))
    }
}

impl FromIterator<Usage> for Usages {
    fn from_iter<I: IntoIterator<Item = Usage>>(usages: I) -> Self {
        usages.into_iter().fold(Self::empty(), Self::with)
    }
}

/// Names separated by commas.
impl fmt::Display for Usages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, usage) in self.iter().enumerate() {
            write!(f, "{}{}", if i == 0 { "" } else { ", " }, usage.name())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_was_put_in_and_nothing_else() {
        for usage in Usage::ALL {
            assert_eq!(Usage::from_name(usage.name()), Some(usage));
            let set = Usages::empty().with(usage);
            assert_eq!(set.iter().collect::<Vec<_>>(), [usage]);
            assert!(set.minus(set).is_empty());
        }
        assert_eq!(Usage::from_name("any"), None);
        let all: Usages = Usage::ALL.into_iter().collect();
        assert_eq!(all.minus(Usages::DEFAULT), Usages::empty().with(Usage::KeyEncipherment));
        assert_eq!(Usages::DEFAULT.to_string(), "digital signature, server auth, client auth");
    }
}
