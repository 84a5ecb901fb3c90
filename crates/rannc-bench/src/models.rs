//! Models as graphs, with real shapes, operation counts and kept tensors, at the granularity of capture.
//!
//! All end in a loss that is a sum over rows, so that every schedule may run them.

mod coarse;
mod layers;
mod other;
mod transformer;
mod vision;

use rannc_graph::{Affine, Graph};

pub use coarse::{chain, densenet430, gnmt78, piper_bert96};
pub use other::{gnmt, mlp, recommender};
pub use transformer::{Transformer, bert, encoder_decoder, gpt, mixture_of_experts};
pub use vision::{densenet, nasnet, unet, wide_resnet};

/// The same model in 16 bits.
pub fn in_bfloat16(graph: &Graph) -> Graph {
    let values = graph.values().iter().cloned().map(|mut value| {
        if value.dtype == "float32" {
            "bfloat16".clone_into(&mut value.dtype);
        }
        value
    });
    let nodes = graph.nodes().iter().cloned().map(|mut node| {
        let Affine { per_row, fixed } = node.saved_bytes;
        node.saved_bytes = Affine { per_row: per_row / 2, fixed: fixed / 2 };
        node
    });
    let (inputs, outputs) = (graph.inputs().to_vec(), graph.outputs().to_vec());
    let (name, batch) = (graph.name().to_owned(), graph.batch().clone());
    Graph::new(name, batch, values.collect(), nodes.collect(), inputs, outputs)
        .expect("only the type of its numbers is another")
}

#[cfg(test)]
mod tests {
    use rannc_graph::{Graph, Rows, ValueKind};
    use rannc_partition::{Atoms, stages_are_valid};

    use super::{
        Transformer, bert, chain, densenet, densenet430, encoder_decoder, gnmt, gnmt78, gpt,
        mixture_of_experts, mlp, nasnet, piper_bert96, recommender, unet, wide_resnet,
    };

    fn all() -> Vec<Graph> {
        let small = Transformer::new(2, 64, 16);
        vec![
            gpt(small),
            bert(small),
            encoder_decoder(small),
            mixture_of_experts(small, 4),
            wide_resnet([1, 1, 2, 1], 2, 32),
            unet(3, 8, 32),
            densenet(8, 32),
            nasnet(6, 8, 32),
            gnmt(3, 32, 20, 4),
            recommender(8, 1000, 16, 4),
            mlp(4, 32),
            piper_bert96(),
            densenet430(),
            gnmt78(),
            chain(10, 16, 2),
        ]
    }

    fn parameters(graph: &Graph) -> i64 {
        let values = graph.values().iter().filter(|value| value.kind == ValueKind::Parameter);
        values.map(|value| value.shape.iter().map(|size| size.fixed).product::<i64>()).sum()
    }

    #[test]
    fn every_model_ends_in_a_loss_and_can_be_cut() {
        for graph in all() {
            let loss = graph.value(graph.outputs()[0]);
            assert!(loss.rows == Rows::Sum && loss.requires_grad, "{}", graph.name());
            let atoms = Atoms::new(&graph);
            assert!(atoms.len() > 4, "{}", graph.name());
            let half = atoms.len() / 2;
            let stages = [atoms.stage(&graph, 0..half), atoms.stage(&graph, half..atoms.len())];
            stages_are_valid(&graph, &stages).unwrap();
        }
    }

    #[test]
    fn layers_repeat_with_equal_signatures() {
        let graph = gpt(Transformer::new(3, 64, 16));
        let of = |layer: &str| -> Vec<&str> {
            let nodes = graph.nodes().iter().filter(|node| node.module.starts_with(layer));
            nodes.map(|node| node.signature.as_str()).collect()
        };
        assert!((12..=20).contains(&of("layers.1").len()));
        assert_eq!(of("layers.1"), of("layers.2"));
    }

    #[test]
    fn sizes_are_those_of_the_published_models() {
        // GPT-2 small has 124 M parameters, BERT-Large about 335 M, ResNet-50 25.6 M, DenseNet-121
        // 8.0 M; ours differ by paddings of the vocabulary and biases, so 2 % is allowed.
        let bert_large = Transformer { vocabulary: 30_522, ..Transformer::new(24, 1024, 512) };
        for (graph, millions) in [
            (gpt(Transformer::new(12, 768, 1024)), 124.4),
            (bert(bert_large), 335.0),
            (wide_resnet([3, 4, 6, 3], 1, 224), 25.6),
            (densenet(32, 224), 8.0),
        ] {
            let found = parameters(&graph) as f64 / 1e6;
            assert!((found / millions - 1.0).abs() < 0.02, "{}: {found}", graph.name());
        }
    }

    #[test]
    fn shapes_of_earlier_benchmarks_have_their_sizes() {
        assert_eq!(piper_bert96().nodes().len(), 101);
        assert_eq!(densenet430().nodes().len(), 430);
        assert_eq!(gnmt78().nodes().len(), 78);
    }
}
