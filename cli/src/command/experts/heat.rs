//! `guild experts load`: the load of the experts as a map for the terminal.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use guild_proto::cluster::v1::ExpertLoadResponse;
use serde::Serialize;

use super::leader::Asking;
use crate::args::ExpertsLoad;
use crate::command::{block_on, log_tool, signals};
use crate::failure::Failure;
use crate::json;
use crate::units::count;

/// Columns of the map, at most.
const COLUMNS: usize = 64;
/// Hottest experts that are listed.
const HOTTEST: usize = 8;
/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// Shades by how many times the mean of its layer an expert gets: below the
/// first bound the first.
const SHADES: [(f64, char); 5] = [
    (0.25, '·'),
    (0.75, '░'),
    (1.5, '▒'),
    (3.0, '▓'),
    (f64::INFINITY, '█'),
];
/// Home of the cursor, and nothing below it.
const CLEAR: &str = "\x1b[H\x1b[2J";

pub(super) fn run(args: &ExpertsLoad) -> Result<(), Failure> {
    log_tool(&args.common)?;
    block_on(async {
        let shutdown = signals()?;
        let mut leader = Asking::at(&args.leader)?;
        loop {
            let load = Load::of(&leader.load(None).await?);
            if args.json {
                json::print(&load)?;
            } else {
                let clear = if args.watch { CLEAR } else { "" };
                let mut stdout = std::io::stdout();
                write!(stdout, "{clear}{}", load.map())?;
                stdout.flush()?;
            }
            if !args.watch {
                return Ok(());
            }
            tokio::select! {
                () = shutdown.requested() => return Ok(()),
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    })
}

/// What a look has shown.
#[derive(Debug, Serialize)]
struct Load {
    epoch: u64,
    shot_ms: u32,
    window_shots: u32,
    experts: u32,
    layers: Vec<LayerLoad>,
    nodes: Vec<NodeLoad>,
}

#[derive(Debug, Serialize)]
struct LayerLoad {
    layer: u32,
    /// Mean load of the nodes over the highest: rows poured over homes by
    /// water-filling, over the nodes' speeds.
    balancedness: f64,
    /// The same as EPLB reckons: rows shared evenly by homes, on like nodes.
    even_balancedness: f64,
    /// Rows of each expert in the window.
    rows: Vec<u64>,
    /// Rows a shot, exponentially weighted.
    ewma: Vec<f64>,
    /// Nodes that hold each expert.
    homes: Vec<Vec<u32>>,
}

#[derive(Debug, Serialize)]
struct NodeLoad {
    node: u32,
    name: String,
    /// Rows of the window for each layer.
    rows: Vec<f64>,
}

impl Load {
    fn of(answer: &ExpertLoadResponse) -> Load {
        let experts = answer.experts as usize;
        let layer = |(at, &layer): (usize, &u32)| {
            let cells = at * experts..(at + 1) * experts;
            let mut homes = vec![Vec::new(); experts];
            for node in &answer.nodes {
                for slot in node.slots.iter().filter(|slot| slot.layer == layer) {
                    if let Some(homes) = homes.get_mut(slot.expert as usize) {
                        homes.push(node.node_id);
                    }
                }
            }
            LayerLoad {
                layer,
                balancedness: answer.balancedness[at],
                even_balancedness: answer.even_balancedness[at],
                rows: answer.rows[cells.clone()].to_vec(),
                ewma: answer.ewma.get(cells).unwrap_or_default().to_vec(),
                homes,
            }
        };
        let node = |node: &guild_proto::cluster::v1::ExpertNodeLoad| NodeLoad {
            node: node.node_id,
            name: node.name.clone(),
            rows: node.rows.clone(),
        };
        Load {
            epoch: answer.epoch,
            shot_ms: answer.shot_ms,
            window_shots: answer.window,
            experts: answer.experts,
            layers: answer.layers.iter().enumerate().map(layer).collect(),
            nodes: answer.nodes.iter().map(node).collect(),
        }
    }

    fn map(&self) -> String {
        let mut out = String::new();
        let rows: u64 = self.layers.iter().flat_map(|l| &l.rows).sum();
        // Writing into a string does not fail.
        let _ = writeln!(
            out,
            "epoch {}: {} rows in {} shots of {} ms",
            self.epoch,
            count(rows),
            self.window_shots,
            self.shot_ms
        );
        if rows == 0 {
            let _ = writeln!(out, "nothing has been routed yet");
            return out;
        }
        let each = (self.experts as usize).div_ceil(COLUMNS).max(1);
        let _ = writeln!(
            out,
            "layer  experts 0 to {}, {each} a column",
            self.experts.saturating_sub(1)
        );
        for layer in &self.layers {
            let _ = writeln!(
                out,
                "{:>5}  {}  balancedness {:.2}, by an even split {:.2}",
                layer.layer,
                layer.shades(each),
                layer.balancedness,
                layer.even_balancedness
            );
        }
        let _ = writeln!(
            out,
            "times the mean of the layer: · below 0.25  ░ 0.75  ▒ 1.5  ▓ 3  █ above"
        );
        self.hottest(&mut out);
        self.by_node(&mut out);
        out
    }

    fn hottest(&self, out: &mut String) {
        let mut all: Vec<(f64, &LayerLoad, usize)> = (self.layers.iter())
            .flat_map(|layer| {
                let mean = layer.mean();
                let of_mean = move |rows: u64| if mean > 0.0 { rows as f64 / mean } else { 0.0 };
                (layer.rows.iter().enumerate())
                    .map(move |(expert, &rows)| (of_mean(rows), layer, expert))
            })
            .collect();
        // A stable sort: ties stay in the order of layers and experts.
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let _ = writeln!(out, "hottest experts:");
        for (times, layer, expert) in all.into_iter().take(HOTTEST) {
            let homes: Vec<&str> = (self.nodes.iter())
                .filter(|node| layer.homes[expert].contains(&node.node))
                .map(|node| node.name.as_str())
                .collect();
            let _ = writeln!(
                out,
                "  layer {:>3} expert {:>3}  {:>10} rows  {times:>5.2} times the mean  on {}",
                layer.layer,
                expert,
                count(layer.rows[expert]),
                homes.join(", ")
            );
        }
    }

    fn by_node(&self, out: &mut String) {
        let _ = writeln!(out, "nodes:");
        let wide = self.nodes.iter().map(|node| node.name.chars().count());
        let wide = wide.max().unwrap_or(0);
        for node in &self.nodes {
            let rows: f64 = node.rows.iter().sum();
            let _ = writeln!(
                out,
                "  {:<wide$}  {:>10} rows",
                node.name,
                count(rows as u64)
            );
        }
    }
}

impl LayerLoad {
    fn mean(&self) -> f64 {
        self.rows.iter().sum::<u64>() as f64 / self.rows.len().max(1) as f64
    }

    /// A character for every `each` experts: the shade of the hottest.
    fn shades(&self, each: usize) -> String {
        let mean = self.mean();
        let shade = |experts: &[u64]| {
            let hottest = experts.iter().copied().max().unwrap_or(0);
            if hottest == 0 {
                return ' ';
            }
            let times = hottest as f64 / mean;
            let shade = SHADES.iter().find(|(bound, _)| times < *bound);
            shade.map_or('█', |(_, shade)| *shade)
        };
        self.rows.chunks(each).map(shade).collect()
    }
}

#[cfg(test)]
mod tests {
    use guild_proto::cluster::v1::{ExpertLoadResponse, ExpertNodeLoad, Slot};

    use super::Load;

    /// Two layers of four experts on two nodes; expert 0 of layer 1 has two homes.
    fn fixed() -> ExpertLoadResponse {
        let slot = |layer, expert| Slot { layer, expert };
        let node = |id: u32, slots: Vec<Slot>, rows: Vec<f64>| ExpertNodeLoad {
            node_id: id,
            name: format!("expert-{id}"),
            slots,
            rows,
        };
        ExpertLoadResponse {
            epoch: 7,
            layers: vec![1, 2],
            experts: 4,
            shot_ms: 1000,
            closed: 9,
            window: 3,
            rows: vec![1300, 300, 0, 0, 40, 40, 40, 5],
            ewma: Vec::new(),
            nodes: vec![
                node(
                    1,
                    vec![slot(1, 0), slot(1, 1), slot(2, 0), slot(2, 1)],
                    vec![950.0, 80.0],
                ),
                node(
                    2,
                    vec![slot(1, 0), slot(1, 2), slot(1, 3), slot(2, 2), slot(2, 3)],
                    vec![650.0, 45.0],
                ),
            ],
            balancedness: vec![0.842, 0.781],
            even_balancedness: vec![0.651, 0.781],
            shots: Vec::new(),
        }
    }

    #[test]
    fn a_fixed_load_gives_a_fixed_map() {
        let map = Load::of(&fixed()).map();
        let want = "\
epoch 7: 1,725 rows in 3 shots of 1000 ms
layer  experts 0 to 3, 1 a column
    1  █▒    balancedness 0.84, by an even split 0.65
    2  ▒▒▒·  balancedness 0.78, by an even split 0.78
times the mean of the layer: · below 0.25  ░ 0.75  ▒ 1.5  ▓ 3  █ above
hottest experts:
  layer   1 expert   0       1,300 rows   3.25 times the mean  on expert-1, expert-2
  layer   2 expert   0          40 rows   1.28 times the mean  on expert-1
  layer   2 expert   1          40 rows   1.28 times the mean  on expert-1
  layer   2 expert   2          40 rows   1.28 times the mean  on expert-2
  layer   1 expert   1         300 rows   0.75 times the mean  on expert-1
  layer   2 expert   3           5 rows   0.16 times the mean  on expert-2
  layer   1 expert   2           0 rows   0.00 times the mean  on expert-2
  layer   1 expert   3           0 rows   0.00 times the mean  on expert-2
nodes:
  expert-1       1,030 rows
  expert-2         695 rows
";
        assert_eq!(map, want, "\n{map}");
    }

    #[test]
    fn many_experts_share_columns_and_no_load_is_said() {
        let mut many = fixed();
        many.experts = 256;
        many.layers = vec![3];
        many.rows = (0..256).map(|e| if e == 9 { 400 } else { 1 }).collect();
        many.balancedness = vec![0.5];
        many.even_balancedness = vec![0.5];
        for node in &mut many.nodes {
            node.rows.truncate(1);
        }
        let map = Load::of(&many).map();
        let line = map.lines().nth(2).unwrap_or_default();
        // 256 in 64 columns: expert 9 is in the third.
        assert!(line.starts_with("    3  ░░█░"), "{line}");
        assert_eq!(line.matches('░').count(), 63, "{line}");
        many.rows.fill(0);
        assert!(
            Load::of(&many)
                .map()
                .ends_with("nothing has been routed yet\n")
        );
    }
}
