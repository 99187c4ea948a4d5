//! How fast a number of replicas follows what the metrics ask for: stabilization and policies
//! (<https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/#configurable-scaling-behavior>).

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::autoscaling::v2::{HPAScalingPolicy, HPAScalingRules, HorizontalPodAutoscalerBehavior};

/// How long a smaller number has to have been enough, if nobody says
/// (`--horizontal-pod-autoscaler-downscale-stabilization`).
const DOWN_WINDOW: i64 = 300;
/// Nothing is remembered for longer than the longest window or period that is allowed.
const MEMORY: SignedDuration = SignedDuration::from_secs(3600);

/// What an autoscaler remembers. It is lost when the controller starts again: then nothing is scaled down for a window, as if the
/// present number had just been asked for.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// What metrics asked for, and when.
    recommended: Vec<(Timestamp, i32)>,
    /// By how much replicas were changed, and when.
    changed: Vec<(Timestamp, i32)>,
}

impl Memory {
    /// Begins with the number as it is.
    pub fn begin(&mut self, current: i32, now: Timestamp) {
        if self.recommended.is_empty() {
            self.recommended.push((now, current));
        }
    }

    /// Notes that the number was changed.
    pub fn scaled(&mut self, from: i32, to: i32, now: Timestamp) {
        self.changed.push((now, to - from));
    }

    fn tidy(&mut self, now: Timestamp) {
        let recent = |(at, _): &(Timestamp, i32)| now.duration_since(*at) < MEMORY;
        // One is kept: what begins anew is not the same as what has not changed for long.
        let last = self.recommended.last().copied();
        self.recommended.retain(recent);
        if self.recommended.is_empty() {
            self.recommended.extend(last);
        }
        self.changed.retain(recent);
    }

    /// By how much replicas were raised, and lowered, within so many seconds.
    fn change(&self, seconds: i32, now: Timestamp) -> (i32, i32) {
        let period = SignedDuration::from_secs(seconds.into());
        let recent = self.changed.iter().filter(|(at, _)| now.duration_since(*at) < period);
        recent.fold((0, 0), |(up, down), (_, change)| (up + change.max(&0), down - change.min(&0)))
    }
}

/// Why a condition is as it is: a reason and a message.
pub type Why = (&'static str, &'static str);

/// What comes of a recommendation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Normal {
    /// So many replicas.
    pub replicas: i32,
    /// Whether what was asked for lately was kept to.
    pub able: Why,
    /// Whether a limit was met, and which.
    pub limited: (bool, Why),
}

/// The numbers that it is about.
#[derive(Clone, Copy, Debug)]
pub struct Numbers {
    /// As it is.
    pub current: i32,
    /// As the metrics ask for.
    pub desired: i32,
    /// At least.
    pub min: i32,
    /// At most.
    pub max: i32,
}

fn policy(type_: &str, value: i32) -> HPAScalingPolicy {
    HPAScalingPolicy { type_: type_.into(), value, period_seconds: 15 }
}

/// The rules for a direction; those that hold where none are given.
fn rules(
    given: Option<&HPAScalingRules>,
    default: &[HPAScalingPolicy],
    window: i64,
) -> (HPAScalingRules, SignedDuration) {
    let mut rules = given.cloned().unwrap_or_default();
    rules.policies.get_or_insert_with(|| default.to_vec());
    let window = rules.stabilization_window_seconds.map_or(window, i64::from);
    (rules, SignedDuration::from_secs(window))
}

/// Decides, and remembers what was asked for.
pub fn normalize(
    behavior: Option<&HorizontalPodAutoscalerBehavior>,
    numbers: Numbers,
    memory: &mut Memory,
    now: Timestamp,
) -> Normal {
    memory.tidy(now);
    let up = behavior.and_then(|behavior| behavior.scale_up.as_ref());
    let (up, up_window) = rules(up, &[policy("Pods", 4), policy("Percent", 100)], 0);
    let down = behavior.and_then(|behavior| behavior.scale_down.as_ref());
    let (down, down_window) = rules(down, &[policy("Percent", 100)], DOWN_WINDOW);

    let stable = stabilize(numbers, memory, up_window, down_window, now);
    let able = match () {
        () if stable == numbers.desired => ("ReadyForNewScale", "recommended size matches current size"),
        () if numbers.desired >= numbers.current => (
            "ScaleUpStabilized",
            "recent recommendations were lower than current one, applying the lowest recent recommendation",
        ),
        () => (
            "ScaleDownStabilized",
            "recent recommendations were higher than current one, applying the highest recent recommendation",
        ),
    };
    memory.recommended.push((now, numbers.desired));
    let numbers = Numbers { desired: stable, ..numbers };
    let (replicas, why) = if stable > numbers.current {
        raise(numbers, &up, memory, now)
    } else if stable < numbers.current {
        lower(numbers, &down, memory, now)
    } else {
        bound(numbers)
    };
    Normal { replicas, able, limited: (replicas != stable, why) }
}

/// A number is raised to the least, and lowered to the most, that was asked for within the window.
fn stabilize(
    numbers: Numbers,
    memory: &Memory,
    up_window: SignedDuration,
    down_window: SignedDuration,
    now: Timestamp,
) -> i32 {
    let within = |window: SignedDuration| {
        memory.recommended.iter().filter(move |(at, _)| now.duration_since(*at) < window).map(|(_, replicas)| *replicas)
    };
    let least = within(up_window).fold(numbers.desired, i32::min);
    let most = within(down_window).fold(numbers.desired, i32::max);
    numbers.current.max(least).min(most)
}

const IN_RANGE: Why = ("DesiredWithinRange", "the desired count is within the acceptable range");
const TOO_MANY: Why = ("TooManyReplicas", "the desired replica count is more than the maximum replica count");
const TOO_FEW: Why = ("TooFewReplicas", "the desired replica count is less than the minimum replica count");
const TOO_FAST_UP: Why = ("ScaleUpLimit", "the desired replica count is increasing faster than the maximum scale rate");
const TOO_FAST_DOWN: Why =
    ("ScaleDownLimit", "the desired replica count is decreasing faster than the maximum scale rate");

fn bound(numbers: Numbers) -> (i32, Why) {
    match numbers.desired {
        desired if desired > numbers.max => (numbers.max, TOO_MANY),
        desired if desired < numbers.min => (numbers.min, TOO_FEW),
        desired => (desired, IN_RANGE),
    }
}

fn raise(numbers: Numbers, rules: &HPAScalingRules, memory: &Memory, now: Timestamp) -> (i32, Why) {
    let propose = |policy: &HPAScalingPolicy, start: i32| match policy.type_.as_str() {
        "Pods" => start.saturating_add(policy.value),
        // Rounded up, or few pods would never become more.
        _ => (f64::from(start) * (1.0 + f64::from(policy.value) / 100.0)).ceil().min(f64::from(i32::MAX)) as i32,
    };
    let limit = limit(numbers.current, rules, memory, now, propose, false).max(numbers.current);
    let (most, why) = if limit < numbers.max { (limit, TOO_FAST_UP) } else { (numbers.max, TOO_MANY) };
    if numbers.desired > most { (most, why) } else { bound(numbers) }
}

fn lower(numbers: Numbers, rules: &HPAScalingRules, memory: &Memory, now: Timestamp) -> (i32, Why) {
    let propose = |policy: &HPAScalingPolicy, start: i32| match policy.type_.as_str() {
        "Pods" => start.saturating_sub(policy.value),
        _ => (f64::from(start) * (1.0 - f64::from(policy.value) / 100.0)) as i32,
    };
    let limit = limit(numbers.current, rules, memory, now, propose, true).min(numbers.current);
    let (least, why) = if limit > numbers.min { (limit, TOO_FAST_DOWN) } else { (numbers.min, TOO_FEW) };
    if numbers.desired < least { (least, why) } else { bound(numbers) }
}

/// How far the policies let the number go. Each looks at what it was when its period began.
fn limit(
    current: i32,
    rules: &HPAScalingRules,
    memory: &Memory,
    now: Timestamp,
    propose: impl Fn(&HPAScalingPolicy, i32) -> i32,
    down: bool,
) -> i32 {
    let select = rules.select_policy.as_deref().unwrap_or("Max");
    if select == "Disabled" {
        return current;
    }
    let proposals = rules.policies.iter().flatten().map(|policy| {
        let (raised, lowered) = memory.change(policy.period_seconds, now);
        propose(policy, current - raised + lowered)
    });
    // The policy that changes most, unless the one is wanted that changes least.
    let largest = (select == "Min") == down;
    let chosen = if largest { proposals.max() } else { proposals.min() };
    chosen.unwrap_or(current)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    /// Runs an autoscaler with a target that does as it says: at these times metrics ask for so many, and so many there are
    /// then.
    fn check(behavior: Value, start: i32, steps: &[(i64, i32, i32, &str)]) {
        let parsed: Option<HorizontalPodAutoscalerBehavior> = serde_json::from_value(behavior.clone()).unwrap();
        let (mut memory, mut current) = (Memory::default(), start);
        memory.begin(current, at(0));
        for (seconds, desired, expect, why) in steps {
            let numbers = Numbers { current, desired: *desired, min: 1, max: 20 };
            let normal = normalize(parsed.as_ref(), numbers, &mut memory, at(*seconds));
            let reason = if normal.limited.0 { normal.limited.1.0 } else { normal.able.0 };
            assert_eq!((normal.replicas, reason), (*expect, *why), "{behavior} after {seconds} s at {current}");
            if normal.replicas != current {
                memory.scaled(current, normal.replicas, at(*seconds));
            }
            current = normal.replicas;
        }
    }

    const READY: &str = "ReadyForNewScale";

    #[test]
    fn as_it_is_without_a_behavior() {
        check(
            json!(null),
            1,
            &[
                (15, 3, 3, READY),
                (30, 30, 7, "ScaleUpLimit"),
                (45, 30, 14, "ScaleUpLimit"),
                (60, 30, 20, "TooManyReplicas"),
                // Down only when less has been enough for five minutes, and then at once.
                (75, 2, 20, "ScaleDownStabilized"),
                (300, 2, 20, "ScaleDownStabilized"),
                (361, 2, 2, READY),
                (400, 0, 2, "ScaleDownStabilized"),
                (662, 0, 1, "TooFewReplicas"),
            ],
        );
        // Nothing is known of the time before: the number as it was is taken to have been needed.
        check(json!(null), 5, &[(15, 1, 5, "ScaleDownStabilized"), (301, 1, 1, READY)]);
    }

    #[test]
    fn policies_and_windows() {
        let slow_up = json!({"scaleUp": {"stabilizationWindowSeconds": 60, "policies": [
            {"type": "Pods", "value": 1, "periodSeconds": 60}]}});
        check(
            slow_up,
            2,
            &[
                (15, 5, 2, "ScaleUpStabilized"),
                (61, 5, 3, "ScaleUpLimit"),
                (76, 5, 3, "ScaleUpLimit"),
                (122, 5, 4, "ScaleUpLimit"),
            ],
        );
        let slow_down = json!({"scaleDown": {"stabilizationWindowSeconds": 0, "policies": [
            {"type": "Percent", "value": 10, "periodSeconds": 60}, {"type": "Pods", "value": 4, "periodSeconds": 60}]}});
        check(
            slow_down,
            20,
            &[(15, 1, 16, "ScaleDownLimit"), (30, 1, 16, "ScaleDownLimit"), (76, 1, 12, "ScaleDownLimit")],
        );
        let slower = json!({"scaleDown": {"stabilizationWindowSeconds": 0, "selectPolicy": "Min", "policies": [
            {"type": "Percent", "value": 10, "periodSeconds": 60}, {"type": "Pods", "value": 4, "periodSeconds": 60}]}});
        check(slower, 20, &[(15, 1, 18, "ScaleDownLimit")]);
        let never = json!({"scaleDown": {"stabilizationWindowSeconds": 0, "selectPolicy": "Disabled"}});
        check(never, 20, &[(15, 1, 20, "ScaleDownLimit"), (4000, 1, 20, "ScaleDownLimit")]);
        let gentle = json!({"scaleUp": {"selectPolicy": "Min", "policies": [
            {"type": "Percent", "value": 100, "periodSeconds": 15}, {"type": "Pods", "value": 4, "periodSeconds": 15}]}});
        check(gentle, 1, &[(15, 20, 2, "ScaleUpLimit")]);
    }
}
