//! What failed when, as a picture: one panel for each run and client, a bar for each tenth of a second. Pure.

use std::fmt::Write as _;

/// How many requests ended well and how many failed in each slot, from some time before the fault on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Series {
    /// What stands above it.
    pub title: String,
    /// By slot: answered, failed.
    pub slots: Vec<(u32, u32)>,
}

/// The plot's measures, in pixels.
const LEFT: f64 = 56.0;
const WIDTH: f64 = 900.0;
const PANEL: f64 = 84.0;
const BAR: f64 = 52.0;
const TOP: f64 = 34.0;

/// A picture of `series`, whose slots are `slot` seconds wide; the fault was `before` seconds after the first one began.
pub fn svg(title: &str, series: &[Series], slot: f64, before: f64) -> String {
    let count = series.iter().map(|s| s.slots.len()).max().unwrap_or(0).max(1);
    let height = TOP + PANEL * series.len() as f64 + 34.0;
    let most = series.iter().flat_map(|s| &s.slots).map(|(well, failed)| well + failed).max().unwrap_or(1).max(1);
    let x = |slots: f64| LEFT + slots * WIDTH / count as f64;
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n<text x=\"{LEFT}\" y=\"18\" \
         font-size=\"14\">{}</text>",
        LEFT + WIDTH + 20.0,
        escape(title)
    );
    for (number, one) in series.iter().enumerate() {
        let floor = TOP + PANEL * number as f64 + PANEL - 12.0;
        let _ = writeln!(out, "<text x=\"{LEFT}\" y=\"{:.1}\">{}</text>", floor - BAR - 5.0, escape(&one.title));
        let (mut well, mut failed) = (String::new(), String::new());
        let width = (WIDTH / count as f64).max(0.5);
        for (index, (answered, lost)) in one.slots.iter().enumerate() {
            let left = x(index as f64);
            let of = |n: u32| BAR * f64::from(n) / f64::from(most);
            let bar = |path: &mut String, n: u32, above: f64| {
                if n > 0 {
                    let _ = write!(path, "M{left:.1} {:.1}h{width:.2}v{:.1}h-{width:.2}z", floor - above, -of(n));
                }
            };
            bar(&mut failed, *lost, 0.0);
            bar(&mut well, *answered, of(*lost));
        }
        let _ = writeln!(out, "<path d=\"{well}\" fill=\"#9fc5a8\"/><path d=\"{failed}\" fill=\"#c0392b\"/>");
        let _ = writeln!(out, "<path d=\"M{LEFT} {floor:.1}h{WIDTH}\" stroke=\"#888\"/>");
        let fault = x(before / slot);
        let _ = writeln!(
            out,
            "<path d=\"M{fault:.1} {:.1}v{:.1}\" stroke=\"#000\" stroke-dasharray=\"3 3\"/>",
            floor,
            -BAR - 2.0
        );
    }
    let bottom = TOP + PANEL * series.len() as f64 + 8.0;
    let seconds = count as f64 * slot - before;
    let step = [1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0].into_iter().find(|s| seconds / s <= 20.0).unwrap_or(120.0);
    let mut at = 0.0;
    while at <= seconds {
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{bottom:.1}\" text-anchor=\"middle\">{at} s</text>",
            x((at + before) / slot)
        );
        at += step;
    }
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"{:.1}\" fill=\"#555\">requests in each {slot} s: green answered, red failed (by when they \
         were made); the dashed line is the fault</text>\n</svg>",
        bottom + 18.0
    );
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture() {
        let series = [
            Series { title: "nftables <fast>".into(), slots: vec![(4, 0), (2, 2), (0, 4), (4, 0)] },
            Series { title: "relay".into(), slots: vec![(4, 0); 4] },
        ];
        let picture = svg("node-power-off", &series, 0.1, 0.1);
        assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
        assert!(picture.contains("nftables &lt;fast&gt;"));
        // The failures of the second slot stand on the floor, the answers above them.
        let failed = picture.lines().find(|l| l.contains("#c0392b") && l.contains("#9fc5a8")).unwrap();
        let red = failed.split("<path d=\"").nth(2).unwrap();
        assert_eq!(red.matches('M').count(), 2, "{failed}");
        assert!(red.contains("v-52.0") && red.contains("v-26.0"), "{failed}");
    }
}
