//! The flags of what the API server is given to do.

use std::time::Duration;

use anyhow::bail;

use super::duration;

/// How many requests a server carries out at a time, by upstream's names
/// (<https://kubernetes.io/docs/concepts/cluster-administration/flow-control/>).
#[derive(clap::Args)]
pub struct InflightOptions {
    /// How many requests that change nothing are carried out at a time. With those that change something, the seats that are
    /// shared out by priority. 0 for as many as come.
    #[arg(long, default_value_t = 400, value_name = "COUNT")]
    max_requests_inflight: u32,
    /// How many requests that change something are carried out at a time.
    #[arg(long, default_value_t = 200, value_name = "COUNT")]
    max_mutating_requests_inflight: u32,
    /// Whether requests wait for their turn by priority and fairness; without, what is too much is refused.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "true|false")]
    enable_priority_and_fairness: bool,
    /// With which probability, at most 0.02, a request tells its HTTP/2 client to come again on another connection, which
    /// spreads clients over several servers behind one entry.
    #[arg(long, default_value_t = 0.0, value_name = "PROBABILITY")]
    goaway_chance: f64,
    /// How long an event is kept after it was last seen.
    #[arg(long, default_value = "1h", value_parser = duration, value_name = "DURATION")]
    event_ttl: Duration,
    /// How long a token that Kubernetes once made in a Secret by itself may lie unused before it is marked, and as long again
    /// before it is deleted.
    #[arg(long, default_value = "8760h", value_parser = duration, value_name = "DURATION")]
    legacy_service_account_token_clean_up_period: Duration,
}

impl InflightOptions {
    /// Reads and checks it.
    ///
    /// # Errors
    /// If it is no such probability.
    pub fn goaway_chance(&self) -> anyhow::Result<f64> {
        let chance = self.goaway_chance;
        if !(0.0..=0.02).contains(&chance) {
            bail!("--goaway-chance {chance}: must be between 0 and 0.02, or clients would do nothing but connect");
        }
        Ok(chance)
    }

    /// How long events are kept.
    ///
    /// # Errors
    /// If it is not worth writing them.
    pub fn event_ttl(&self) -> anyhow::Result<Duration> {
        let ttl = self.event_ttl;
        if ttl < Duration::from_secs(1) {
            bail!("--event-ttl {ttl:?}: must be a second at least, e.g. 1h");
        }
        Ok(ttl)
    }

    /// How long tokens may lie unused.
    ///
    /// # Errors
    /// If that is less than a day: uses are written down by the day.
    pub fn legacy_token_period(&self) -> anyhow::Result<jiff::SignedDuration> {
        let period = self.legacy_service_account_token_clean_up_period;
        if period < Duration::from_secs(86_400) {
            bail!("--legacy-service-account-token-clean-up-period {period:?}: must be a day at least, e.g. 8760h");
        }
        Ok(period.try_into()?)
    }

    /// What the API server is told.
    pub fn get(&self) -> seawall_server::Inflight {
        let most = self.max_requests_inflight.saturating_add(self.max_mutating_requests_inflight).min(1_000_000);
        seawall_server::Inflight { most, fair: self.enable_priority_and_fairness }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_api_server_is_not_given() {
        #[derive(clap::Parser)]
        struct Only {
            #[command(flatten)]
            all: InflightOptions,
        }
        let check = |flag: &str, read: fn(&InflightOptions) -> anyhow::Result<()>, why: Option<&str>| {
            let only = <Only as clap::Parser>::try_parse_from(["seawall", flag]).unwrap();
            match (read(&only.all), why) {
                (Ok(()), None) => {}
                (Err(error), Some(why)) => assert!(error.to_string().contains(why), "{flag}: {error}"),
                (read, _) => panic!("{flag}: {read:?}"),
            }
        };
        let chance = |all: &InflightOptions| all.goaway_chance().map(drop);
        check("--goaway-chance=0.02", chance, None);
        check("--goaway-chance=0.03", chance, Some("must be between 0 and 0.02"));
        let ttl = |all: &InflightOptions| all.event_ttl().map(drop);
        check("--event-ttl=1s", ttl, None);
        check("--event-ttl=900ms", ttl, Some("--event-ttl 900ms: must be a second at least"));
        let period = |all: &InflightOptions| all.legacy_token_period().map(drop);
        check("--legacy-service-account-token-clean-up-period=24h", period, None);
        check("--legacy-service-account-token-clean-up-period=23h", period, Some("must be a day at least"));
    }
}
