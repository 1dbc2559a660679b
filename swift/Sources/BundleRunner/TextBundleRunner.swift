// A bundle on ExecuTorch's TextRunner: text in, text out, with the tokenizer inside.
// Not yet run: no Apple device was at hand.

import ExecuTorchLLM
import Foundation

/// The stock runner of ExecuTorch with a bundle's files. It hands prompts over as they are, so that
/// the program pads them to its next length; `ModuleRunner` pads nothing.
public final class TextBundleRunner {
  private let runner: TextRunner
  private let manifest: Manifest

  public init(_ bundle: LanguageBundle) {
    manifest = bundle.manifest
    runner = TextRunner(modelPath: bundle.program.path, tokenizerPath: bundle.tokenizer.path)
  }

  /// Loads program and tokenizer; on Core ML the program is compiled for the device then.
  public func load() throws {
    try runner.load()
  }

  /// Continues `prompt`, and hands out the text as it is made.
  ///
  /// - Parameter beginningTokens: How many tokens of the model's own are put before the prompt.
  public func generate(
    _ prompt: String, count: Int, temperature: Double = 0, beginningTokens: Int = 1,
    onText: @escaping (String) -> Void
  ) throws {
    let context = manifest.context
    try runner.generate(
      prompt,
      Config {
        $0.sequenceLength = context
        $0.maximumNewTokens = count
        $0.temperature = temperature
        $0.isEchoEnabled = false
        $0.bosCount = beginningTokens
      },
      tokenCallback: onText
    )
  }

  /// Ends what is being generated, from any thread.
  public func stop() {
    runner.stop()
  }

  /// Begins a new sequence at position 0.
  public func reset() {
    runner.reset()
  }
}
